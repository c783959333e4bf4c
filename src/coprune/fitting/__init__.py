"""The smallest model that still does a task, proven on items that the search has not seen."""
