"""A float checkpoint and calibration samples -> a statistics folder."""
