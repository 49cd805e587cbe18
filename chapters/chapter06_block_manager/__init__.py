"""Chapter 6: the block manager, which hands pages out, shares them and takes them back."""
