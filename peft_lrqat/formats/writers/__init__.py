"""Writers of the formats that are safetensors files with a `quantization_config`."""
