"""Parts of a model that can be taken out: found, proved to be apart, and what is left without them."""
