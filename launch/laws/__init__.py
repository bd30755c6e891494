"""What the programs of scaling laws do: fitting, comparing, planning."""
