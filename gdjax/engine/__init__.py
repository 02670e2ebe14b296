"""How a tile of problems is run: one problem's program, its two lane layouts, and the loops over them."""
