"""What could keep a pool from being served here, looked at without loading a weight of the base."""
