"""From a weight and what is known of its inputs to a pruned weight."""
