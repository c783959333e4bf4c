"""coprune's steps, one file each; a step turns a model into a model or a record."""
