"""The report of a run: report.json, the page, the model card, and a log line like the Wanda repository's."""
