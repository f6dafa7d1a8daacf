"""The embedded tiny checkpoint, made from nothing: procedural clips, a tokenizer, a T5, a VAE and a DiT."""
