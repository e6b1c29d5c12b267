"""A trained model in a program of one's own: loaded, asked, handed on."""
