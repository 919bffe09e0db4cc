"""The metrics reference and the dashboards of the chart, from what the programs really export."""
