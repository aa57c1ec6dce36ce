"""What both tuners share: the frozen base, checks before anything is changed, merging, the lean loss."""
