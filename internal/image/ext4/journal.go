package ext4

import "context"

// journalStart is the journal's first block: the first that is free at all.
const journalStart = superBlocks

// journalMap is the block map of the journal's inode.
func journalMap() []byte {
	t := makeTree([]extent{{0, journalStart, journalBlocks}}, nil)
	return t.root[:]
}

// writeJournal writes the superblock of an empty journal; the rest of it reads
// as zeros. Features are the kernel's to choose when it mounts.
func (w *Writer) writeJournal(_ context.Context, p *plan) error {
	b := make([]byte, BlockSize)
	for off, v := range map[int]uint32{
		0x00: 0xC03B3998,
		0x04: 4, // superblock, version 2
		0x0C: BlockSize,
		0x10: journalBlocks,
		0x14: 1, // first block of the log
		0x18: 1, // first transaction expected
		0x40: 1, // users
	} {
		be.PutUint32(b[off:], v)
	}
	copy(b[0x30:], p.uuid[:])
	return w.writeBlock(journalStart, b)
}

// writeResize writes the maps of the resize inode. It is a file of the blocks
// reserved for descriptors: the reserved blocks after the first superblock
// serve as indirect blocks, and each lists its copies in the other groups.
func (w *Writer) writeResize(_ context.Context, p *plan) error {
	top := make([]byte, BlockSize)
	for i := p.descBlocks(); i < gdtBlocks; i++ {
		block := 1 + i
		le.PutUint32(top[i%addrPerBlock*4:], uint32(block))
		list := make([]byte, BlockSize)
		for k, g := range p.backups() {
			le.PutUint32(list[k*4:], uint32(block+g*groupBlocks))
		}
		if err := w.writeBlock(block, list); err != nil {
			return err
		}
	}
	return w.writeBlock(p.resizeMap, top)
}
