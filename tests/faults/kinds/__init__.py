"""The faults, by what they are done to. Each function makes one, and gives what it observed."""
