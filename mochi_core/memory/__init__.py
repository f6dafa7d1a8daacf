"""Networks on devices that cannot hold them whole."""
