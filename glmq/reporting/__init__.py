"""What inspect and verify found, as JSON, CSV and self-contained HTML pages."""
