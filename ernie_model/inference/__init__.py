"""Writing answers: the engine that samples, what is read out of its text, tools, and the server."""
