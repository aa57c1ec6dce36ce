"""The two methods as PEFT tuners (`lrqat`, `lowbit_sr`), and what they share (`common`)."""
