"""What `ernie doctor` looks at, one file per subject; each check returns what it found and trains nothing."""
