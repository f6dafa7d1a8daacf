"""Weight files: reading them, knowing what is in them, building networks from them."""
