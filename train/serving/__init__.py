"""What `ernie serve` adds to the server of ernie_model/inference/server: files, addresses and a page to look at."""
