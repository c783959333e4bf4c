"""What a run leaves for people: report.json, the seed's log line, the model card."""
