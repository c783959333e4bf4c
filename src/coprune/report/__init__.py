"""The report of a run: report.json, the page, the model card, the log line of the Wanda repository."""
