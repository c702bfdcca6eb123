"""Where the operators run: one class per backend, and the table of them."""
