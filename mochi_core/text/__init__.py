"""Prompts: tokens, T5 features, and the rules the model was trained with."""
