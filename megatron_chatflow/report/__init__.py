"""Reports: the metrics of one or several runs as one HTML page, and plots of the blend."""
