"""The data source that core offers: any torch Dataset or DataLoader."""
