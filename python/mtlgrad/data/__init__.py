"""The recipes that come along, one file a data set, and the data of three; README.md has sources and licences."""
