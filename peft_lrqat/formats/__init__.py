"""How a layer lies in a file: one module for each format, which reads and writes it. No nn.Module, no whole model."""
