"""How much memory the server will take, decided before anything large is loaded."""
