"""Starting runs on many devices and machines, and the servers they sample from."""
