"""Reports of a run: report.json, pages, charts and tables."""
