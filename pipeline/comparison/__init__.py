"""Runs of machines become claims, tables, charts and a report. Knows neither torch nor MLflow."""
