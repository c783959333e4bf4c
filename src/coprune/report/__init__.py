"""What a run leaves for people: report.json, the page, the model card, the log line of the Wanda repository."""
