"""The one loop over blocks, and what it needs: recording, proof, observation of products, statistics."""
