"""What merging leaves behind: quantized modules and the files they are written to."""
