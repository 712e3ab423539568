"""An edge process and engine processes behind it: what passes between them, and what the edge does with
them."""
