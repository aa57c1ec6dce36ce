"""GGUF: the file format of llama.cpp and what is built on it."""
