package ext4

import "context"

const (
	// has_journal, ext_attr, resize_inode, dir_index.
	featureCompat = 0x4 | 0x8 | 0x10 | 0x20
	// filetype, extents, 64bit, flex_bg.
	featureIncompat = 0x2 | 0x40 | 0x80 | 0x200
	// sparse_super, large_file, huge_file, dir_nlink, extra_isize,
	// metadata_csum.
	featureROCompat = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400

	groupInodesZeroed = 0x4
)

// superblock makes the copy that group g has.
func (w *Writer) superblock(p *plan, g int64) []byte {
	s := make([]byte, 1024)
	u16 := func(off int, v uint16) { le.PutUint16(s[off:], v) }
	u32 := func(off int, v uint32) { le.PutUint32(s[off:], v) }
	blocks, inodes := p.groups*groupBlocks, p.groups*p.inodesPerGroup
	used := int64(len(p.nodes)) + lostFoundIno - 1

	u32(0x00, uint32(inodes))
	u32(0x04, uint32(blocks))
	u32(0x150, uint32(blocks>>32))
	u32(0x0C, uint32(p.freeBlocks))
	u32(0x158, uint32(p.freeBlocks>>32))
	u32(0x10, uint32(inodes-used))
	u32(0x18, 2) // block size 1024 << 2
	u32(0x1C, 2)
	u32(0x20, groupBlocks)
	u32(0x24, groupBlocks)
	u32(0x28, uint32(p.inodesPerGroup))
	u32(0x30, uint32(w.newest)) // last written
	u16(0x36, 0xFFFF)           // no check after a number of mounts
	u16(0x38, 0xEF53)
	u16(0x3A, 1)                // clean
	u16(0x3C, 2)                // on error: read only
	u32(0x40, uint32(w.newest)) // last checked; and no interval for it
	u32(0x4C, 1)                // revision with the fields below
	u32(0x54, lostFoundIno)
	u16(0x58, inodeSize)
	u16(0x5A, uint16(g))
	u32(0x5C, featureCompat)
	u32(0x60, featureIncompat)
	u32(0x64, featureROCompat)
	copy(s[0x68:], p.uuid[:])
	copy(s[0x78:0x88], w.opt.Label)
	u16(0xCE, uint16(p.reservedGDT()))
	u32(0xE0, journalIno)
	copy(s[0xEC:], p.hashSeed[:])
	s[0xFC] = 1 // half MD4
	s[0xFD] = 1 // the journal inode is repeated below
	u16(0xFE, descSize)
	u32(0x100, 0x4|0x8) // mount with user_xattr and acl
	u32(0x108, uint32(w.newest))
	copy(s[0x10C:], journalMap())
	u32(0x10C+16*4, journalBlocks*BlockSize)
	u16(0x15C, inodeExtra)
	u16(0x15E, inodeExtra)
	u32(0x160, 1) // names are hashed as signed bytes, as on x86
	s[0x174] = 4  // 16 groups together hold their metadata when the disk grows
	s[0x175] = 1  // checksums are CRC-32C
	// Groups that growth adds hold no tables that want zeroing: the disk below
	// reads as zeros there. Without this the kernel would write 2 MiB for each.
	copy(s[0x200:0x240], "noinit_itable")
	u32(0x3FC, crc(^uint32(0), s[:0x3FC]))
	return s
}

// writeGroups writes bitmaps, descriptors and superblocks, the first
// superblock last.
func (w *Writer) writeGroups(ctx context.Context, p *plan) error {
	free := w.freeByGroup(p)
	table := make([]byte, p.descBlocks()*BlockSize)
	for g := range p.groups {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.writeGroup(p, g, free[g], table[g*descSize:][:descSize]); err != nil {
			return err
		}
	}
	for _, g := range append(p.backups(), 0) {
		if err := w.writeBlock(g*groupBlocks+1, table); err != nil {
			return err
		}
		at := g * groupBytes
		if g == 0 {
			at = 1024 // behind where a boot sector goes
		}
		if _, err := w.f.WriteAt(w.superblock(p, g), at); err != nil {
			return err
		}
	}
	return nil
}

// freeByGroup sorts the free runs below the allocator's end by group, cutting
// them at the groups' bounds.
func (w *Writer) freeByGroup(p *plan) [][]extent {
	free := make([][]extent, p.groups)
	for _, x := range w.alloc.unused() {
		for x.count > 0 {
			g := x.start / groupBlocks
			n := min(x.count, (g+1)*groupBlocks-x.start)
			free[g] = append(free[g], extent{start: x.start, count: n})
			x.start, x.count = x.start+n, x.count-n
		}
	}
	return free
}

// writeGroup writes the bitmaps of group g and fills its descriptor d.
func (w *Writer) writeGroup(p *plan, g int64, free []extent, d []byte) error {
	first := g * groupBlocks
	blocks := make([]byte, BlockSize)
	used := min(max(w.alloc.next-first, 0), groupBlocks)
	if hasSuper(g) {
		used = max(used, superBlocks)
	}
	setBits(blocks, 0, used)
	for _, x := range free {
		for b := x.start - first; b < x.start-first+x.count; b++ {
			blocks[b/8] &^= 1 << (b % 8)
		}
		used -= x.count
	}
	if err := w.writeBlock(p.blockBitmaps[g], blocks); err != nil {
		return err
	}

	inodes := make([]byte, BlockSize)
	inodesUsed := p.usedInodes(g)
	setBits(inodes, 0, inodesUsed)
	setBits(inodes, p.inodesPerGroup, maxInodesPerGroup) // that do not exist
	if err := w.writeBlock(p.inodeBitmaps[g], inodes); err != nil {
		return err
	}

	dirs := int64(0)
	for i := range inodesUsed {
		ino := g*p.inodesPerGroup + i + 1
		if ino == rootIno || ino >= lostFoundIno && p.nodes[ino-lostFoundIno].isDir() {
			dirs++
		}
	}
	blockSum := crc(w.seed, blocks)
	inodeSum := crc(w.seed, inodes[:p.inodesPerGroup/8])
	put32 := func(lo, hi int, v int64) {
		le.PutUint32(d[lo:], uint32(v))
		le.PutUint32(d[hi:], uint32(v>>32))
	}
	put16 := func(lo, hi int, v int64) {
		le.PutUint16(d[lo:], uint16(v))
		le.PutUint16(d[hi:], uint16(v>>16))
	}
	put32(0x00, 0x20, p.blockBitmaps[g])
	put32(0x04, 0x24, p.inodeBitmaps[g])
	put32(0x08, 0x28, p.tables[g])
	put16(0x0C, 0x2C, groupBlocks-used)
	put16(0x0E, 0x2E, p.inodesPerGroup-inodesUsed)
	put16(0x10, 0x30, dirs)
	le.PutUint16(d[0x12:], groupInodesZeroed)
	put16(0x18, 0x38, int64(blockSum))
	put16(0x1A, 0x3A, int64(inodeSum))
	put16(0x1C, 0x32, p.inodesPerGroup-inodesUsed) // inodes never used
	le.PutUint16(d[0x1E:], uint16(crc(w.seed, le32(uint32(g)), d)))
	return nil
}

// setBits sets the bits from lo up to hi.
func setBits(p []byte, lo, hi int64) {
	for b := lo; b < hi; b++ {
		if b%8 == 0 && hi-b >= 8 {
			p[b/8] = 0xFF
			b += 7
			continue
		}
		p[b/8] |= 1 << (b % 8)
	}
}
