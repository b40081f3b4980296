package ext4

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"time"
)

// plan is the shape of the finished file system: who has which inode, and
// where the metadata stands.
type plan struct {
	nodes          []*node // by inode number, from lostFoundIno on
	groups         int64
	inodesPerGroup int64
	resizeMap      int64 // double indirect block of the resize inode
	freeBlocks     int64
	uuid, hashSeed [16]byte

	// First blocks, by group.
	blockBitmaps, inodeBitmaps, tables []int64
}

func (p *plan) descBlocks() int64  { return ceilDiv(p.groups, descsPerBlock) }
func (p *plan) reservedGDT() int64 { return gdtBlocks - p.descBlocks() }
func (p *plan) tableBlocks() int64 { return p.inodesPerGroup / inodesPerBlock }

// backups lists the groups beyond the first that have a superblock.
func (p *plan) backups() []int64 {
	var gs []int64
	for g := int64(1); g < p.groups; g++ {
		if hasSuper(g) {
			gs = append(gs, g)
		}
	}
	return gs
}

// usedInodes is how many of group g's inodes are in use: always the first.
func (p *plan) usedInodes(g int64) int64 {
	all := int64(len(p.nodes)) + lostFoundIno - 1
	return min(max(all-g*p.inodesPerGroup, 0), p.inodesPerGroup)
}

// plan numbers the tree, gives everything its blocks and fixes the size.
func (w *Writer) plan() (*plan, error) {
	if e, ok := w.root.children["lost+found"]; !ok || !e.n.isDir() {
		if err := w.Mkdir("lost+found", Attr{Mode: 0o700, ModTime: time.Unix(w.newest, 0)}); err != nil {
			return nil, err
		}
	}
	p := &plan{}
	w.number(p)
	w.identify(p)
	for _, n := range append([]*node{w.root}, p.nodes...) {
		if err := w.assign(n); err != nil {
			return nil, err
		}
	}
	return p, w.size(p)
}

// number gives inode numbers in the order of a walk by name.
func (w *Writer) number(p *plan) {
	w.root.ino = rootIno
	give := func(n *node) {
		n.ino = lostFoundIno + uint32(len(p.nodes))
		p.nodes = append(p.nodes, n)
	}
	give(w.root.children["lost+found"].n)
	for todo := []*node{w.root}; len(todo) > 0; {
		d := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, name := range d.names() {
			n := d.children[name].n
			if n.ino == 0 {
				give(n)
			}
			if n.isDir() {
				todo = append(todo, n)
			}
		}
	}
}

// identify derives the identifiers of the file system from its tree.
func (w *Writer) identify(p *plan) {
	h := sha256.New()
	w.root.digest(h)
	for _, n := range p.nodes {
		n.digest(h)
	}
	sum := h.Sum(nil)
	copy(p.uuid[:], sum)
	copy(p.hashSeed[:], sum[16:])
	for _, id := range []*[16]byte{&p.uuid, &p.hashSeed} {
		id[6] = id[6]&0x0F | 0x80 // version 8: of our own making
		id[8] = id[8]&0x3F | 0x80
	}
	w.seed = crc(^uint32(0), p.uuid[:])
}

func (n *node) digest(h hash.Hash) {
	b := make([]byte, 0, 64)
	for _, v := range []int64{int64(n.ino), int64(n.mode), int64(n.uid), int64(n.gid), n.sec, n.nsec, int64(n.links), n.size,
		int64(n.major), int64(n.minor), int64(len(n.extents)), int64(len(n.xattrs)), int64(len(n.children))} {
		b = binary.AppendVarint(b, v)
	}
	for _, x := range n.extents {
		b = binary.AppendVarint(binary.AppendVarint(b, x.start), x.count)
	}
	h.Write(b)
	for _, x := range n.xattrs {
		fmt.Fprintf(h, "%d%q%q", x.index, x.name, x.value)
	}
	h.Write([]byte(n.target))
	for _, name := range n.names() {
		fmt.Fprintf(h, "%q%d", name, n.children[name].n.ino)
	}
}

// assign gives n the blocks that its directory, its attributes and its map of
// blocks need.
func (w *Writer) assign(n *node) error {
	if n.isDir() {
		var blocks int64
		if err := n.dirBlocks(n.leastBlocks(), func([]byte) error { blocks++; return nil }); err != nil {
			return err
		}
		n.size = blocks * BlockSize
		if err := w.append(n, 0, blocks, nil); err != nil {
			return err
		}
	}
	if xattrSize(n.xattrs) > xattrInodeRoom {
		n.xattrBlock, _ = w.alloc.take(1)
	}
	n.tree = makeTree(n.extents, func() int64 { b, _ := w.alloc.take(1); return b })
	return nil
}

func (n *node) leastBlocks() int {
	if n.ino == lostFoundIno {
		return lostFoundBlocks
	}
	return 1
}

// size finds the least number of groups in which everything has its place and
// the room asked for is left.
func (w *Writer) size(p *plan) error {
	inodes := int64(len(p.nodes)) + lostFoundIno
	inodes += inodes/10 + 1024
	start := w.alloc
	for p.groups = max(1, ceilDiv(start.next, groupBlocks)); p.groups <= maxGroups; p.groups++ {
		p.inodesPerGroup = max(defaultInodesPerGroup, ceilDiv(ceilDiv(inodes, p.groups), inodesPerBlock)*inodesPerBlock)
		if p.inodesPerGroup > maxInodesPerGroup {
			continue
		}
		a := start
		a.free, a.reuse = a.free[:len(a.free):len(a.free)], a.reuse[:len(a.reuse):len(a.reuse)]
		p.blockBitmaps, p.inodeBitmaps, p.tables = nil, nil, nil
		for range p.groups {
			p.blockBitmaps = append(p.blockBitmaps, a.takeRun(1))
		}
		for range p.groups {
			p.inodeBitmaps = append(p.inodeBitmaps, a.takeRun(1))
		}
		for range p.groups {
			p.tables = append(p.tables, a.takeRun(p.tableBlocks()))
		}
		p.resizeMap = a.takeRun(1)

		end := p.groups * groupBlocks
		if a.next > end {
			continue
		}
		p.freeBlocks = end - a.next
		for g := ceilDiv(a.next, groupBlocks); g < p.groups; g++ {
			if hasSuper(g) {
				p.freeBlocks -= superBlocks
			}
		}
		for _, x := range a.unused() {
			p.freeBlocks += x.count
		}
		content := end - p.freeBlocks - journalBlocks
		if p.freeBlocks < ceilDiv(w.opt.FreeBytes, BlockSize)+content/10 {
			continue
		}
		w.alloc = a
		return nil
	}
	return fmt.Errorf("%w: larger than %d bytes", ErrTooLarge, int64(maxGroups)*groupBytes)
}

// writeNodes writes what stands in blocks of its own: directories, attributes,
// maps.
func (w *Writer) writeNodes(ctx context.Context, p *plan) error {
	for _, n := range append([]*node{w.root}, p.nodes...) {
		if err := ctx.Err(); err != nil {
			return err
		}
		seed := w.inodeSeed(n.ino)
		if n.isDir() {
			if err := w.writeDir(n, seed); err != nil {
				return err
			}
		}
		if n.xattrBlock != 0 {
			if err := w.writeBlock(n.xattrBlock, xattrBlock(w.seed, n.xattrBlock, n.xattrs)); err != nil {
				return err
			}
		}
		for _, b := range n.tree.blocks {
			le.PutUint32(b.data[extentTail:], crc(seed, b.data[:extentTail]))
			if err := w.writeBlock(b.number, b.data); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *Writer) writeDir(n *node, seed uint32) error {
	x, in := 0, int64(0) // extent, and block inside it
	return n.dirBlocks(n.leastBlocks(), func(b []byte) error {
		le.PutUint32(b[BlockSize-4:], crc(seed, b[:BlockSize-dirTail]))
		if in == n.extents[x].count {
			x, in = x+1, 0
		}
		in++
		return w.writeBlock(n.extents[x].start+in-1, b)
	})
}
