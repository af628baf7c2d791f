"""What a run tells: report.json, and what people see of it."""
