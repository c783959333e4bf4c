"""The report of a run: report.json, the page, the model card, and the Wanda repository's log line."""
