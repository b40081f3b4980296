package ext4

import (
	"context"
	"time"
)

const (
	flagExtents = 0x80000
	sectors     = BlockSize / 512
)

// clampTime brings t into what 34 bits of seconds from 1901 on can say. The
// zero time is the epoch.
func clampTime(t time.Time) (sec, nsec int64) {
	if t.IsZero() {
		return 0, 0
	}
	const least, most = -1 << 31, 1<<34 - 1<<31 - 1
	switch sec := t.Unix(); {
	case sec < least:
		return least, 0
	case sec > most:
		return most, 0
	}
	return t.Unix(), int64(t.Nanosecond())
}

// inodeSeed begins the checksums of what belongs to one inode; generations
// are all 0.
func (w *Writer) inodeSeed(ino uint32) uint32 { return crc(w.seed, le32(ino), le32(0)) }

// sealInode writes the checksum of the inode p.
func (w *Writer) sealInode(ino uint32, p []byte) {
	sum := crc(w.inodeSeed(ino), p)
	le.PutUint16(p[0x7C:], uint16(sum))
	if le.Uint16(p[0x80:]) > 0 {
		le.PutUint16(p[0x82:], uint16(sum>>16))
	}
}

// putTimes sets all four times and says that the larger inode is in use.
func putTimes(p []byte, sec, nsec int64) {
	le.PutUint16(p[0x80:], inodeExtra)
	low := uint32(sec)
	extra := uint32((sec-int64(int32(low)))>>32)&3 | uint32(nsec)<<2
	for _, off := range []int{0x08, 0x0C, 0x10, 0x90} {
		le.PutUint32(p[off:], low)
	}
	for _, off := range []int{0x84, 0x88, 0x8C, 0x94} {
		le.PutUint32(p[off:], extra)
	}
}

func putSize(p []byte, size, blocks int64) {
	le.PutUint32(p[0x04:], uint32(size))
	le.PutUint32(p[0x6C:], uint32(size>>32))
	le.PutUint32(p[0x1C:], uint32(blocks*sectors))
	le.PutUint16(p[0x74:], uint16(blocks*sectors>>32))
}

// encodeInode writes n into the 256 bytes p.
func (w *Writer) encodeInode(n *node, p []byte) {
	le.PutUint16(p[0x00:], uint16(n.mode))
	le.PutUint16(p[0x02:], uint16(n.uid))
	le.PutUint16(p[0x18:], uint16(n.gid))
	le.PutUint16(p[0x78:], uint16(n.uid>>16))
	le.PutUint16(p[0x7A:], uint16(n.gid>>16))
	putTimes(p, n.sec, n.nsec)
	links := n.links
	if n.isDir() && links >= maxLinks {
		links = 1 // dir_nlink: too many to count
	}
	le.PutUint16(p[0x1A:], uint16(links))

	blocks := int64(len(n.tree.blocks))
	for _, x := range n.extents {
		blocks += x.count
	}
	if n.xattrBlock != 0 {
		blocks++
		le.PutUint32(p[0x68:], uint32(n.xattrBlock))
		le.PutUint16(p[0x76:], uint16(n.xattrBlock>>32))
	} else if len(n.xattrs) > 0 {
		q := p[128+inodeExtra:]
		le.PutUint32(q, xattrMagic)
		putXattrs(q[4:], 0, n.xattrs)
	}
	putSize(p, n.size, blocks)

	switch area := p[0x28:0x64]; n.mode & modeType {
	case modeSymlink:
		if n.size <= maxFastLink {
			copy(area, n.target)
			break
		}
		fallthrough
	case modeRegular, modeDir:
		le.PutUint32(p[0x20:], flagExtents)
		copy(area, n.tree.root[:])
	case modeChar, modeBlock:
		// Two encodings: the old one where it can say the number.
		if n.major < 256 && n.minor < 256 {
			le.PutUint32(area, n.major<<8|n.minor)
			break
		}
		le.PutUint32(area[4:], n.minor&0xFF|n.major<<8|n.minor&^0xFF<<12)
	}
	w.sealInode(n.ino, p)
}

// encodeReserved writes the inodes below 11 that are not the root's.
func (w *Writer) encodeReserved(pl *plan, ino uint32, p []byte) {
	switch ino {
	case journalIno:
		le.PutUint16(p, modeRegular|0o600)
		le.PutUint16(p[0x1A:], 1)
		le.PutUint32(p[0x20:], flagExtents)
		putTimes(p, w.newest, 0)
		putSize(p, journalBlocks*BlockSize, journalBlocks)
		copy(p[0x28:], journalMap())
	case resizeIno:
		le.PutUint16(p, modeRegular|0o600)
		le.PutUint16(p[0x1A:], 1)
		putTimes(p, w.newest, 0)
		// The size is nominal: that of a file with a full double indirect block.
		const size = (addrPerBlock*addrPerBlock + addrPerBlock + 12) * BlockSize
		putSize(p, size, 1+pl.reservedGDT()*int64(1+len(pl.backups())))
		le.PutUint32(p[0x28+13*4:], uint32(pl.resizeMap))
	}
	w.sealInode(ino, p)
}

// writeInodes writes the inode tables, as far as they are used.
func (w *Writer) writeInodes(ctx context.Context, pl *plan) error {
	for g := range pl.groups {
		if err := ctx.Err(); err != nil {
			return err
		}
		used := pl.usedInodes(g)
		if used == 0 {
			return nil
		}
		table := make([]byte, ceilDiv(used, inodesPerBlock)*BlockSize)
		for i := range used {
			ino := uint32(g*pl.inodesPerGroup+i) + 1
			p := table[i*inodeSize:][:inodeSize]
			switch {
			case ino == rootIno:
				w.encodeInode(w.root, p)
			case ino < lostFoundIno:
				w.encodeReserved(pl, ino, p)
			default:
				w.encodeInode(pl.nodes[ino-lostFoundIno], p)
			}
		}
		if err := w.writeBlock(pl.tables[g], table); err != nil {
			return err
		}
	}
	return nil
}
