"""Between the socket and the routes: bodies in, answers and errors out, keys, request ids, disconnects."""
