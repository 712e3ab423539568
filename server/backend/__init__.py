"""In front of a server that is there already: loramux routes and blends, the backend generates."""
