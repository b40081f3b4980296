package ext4

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

const (
	xattrMagic      = 0xEA020000
	xattrHeader     = 32 // of a block
	xattrInodeRoom  = inodeSize - 128 - inodeExtra - 4
	xattrBlockRoom  = BlockSize - xattrHeader
	aclAccess       = "system.posix_acl_access"
	aclDefault      = "system.posix_acl_default"
	aclUser         = 2
	aclGroup        = 8
	aclXattrVersion = 2 // of the form that user space sees
	aclDiskVersion  = 1
)

// xattr is one extended attribute: its name space as a number, the rest of its
// name, its value.
type xattr struct {
	index byte
	name  string
	value []byte
}

// nameSpaces are those that ext4 keeps on disk.
var nameSpaces = []struct {
	prefix string
	index  byte
}{{"user.", 1}, {"trusted.", 4}, {"security.", 6}}

// makeXattrs sorts attributes as ext4 wants them and drops those of foreign
// systems.
func makeXattrs(m map[string][]byte) ([]xattr, error) {
	var xs []xattr
	for name, value := range m {
		if name == aclAccess || name == aclDefault {
			acl, err := diskACL(value)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			index := byte(2)
			if name == aclDefault {
				index = 3
			}
			xs = append(xs, xattr{index, "", acl})
			continue
		}
		for _, ns := range nameSpaces {
			rest, ok := strings.CutPrefix(name, ns.prefix)
			if !ok || rest == "" {
				continue
			}
			if len(rest) > maxNameLen {
				return nil, fmt.Errorf("%w: name of %d bytes", ErrAttribute, len(name))
			}
			xs = append(xs, xattr{ns.index, rest, value})
		}
	}
	if n := xattrSize(xs); n > xattrBlockRoom {
		return nil, fmt.Errorf("%w: %d bytes, %d at the most", ErrAttribute, n, xattrBlockRoom)
	}
	slices.SortFunc(xs, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	return xs, nil
}

// diskACL turns an access control list from the form of getxattr(2) into the
// one on disk, where only named users and groups have an id.
func diskACL(v []byte) ([]byte, error) {
	if len(v) < 4 || (len(v)-4)%8 != 0 || le.Uint32(v) != aclXattrVersion {
		return nil, fmt.Errorf("%w: malformed access control list", ErrAttribute)
	}
	out := le32(aclDiskVersion)
	for e := v[4:]; len(e) > 0; e = e[8:] {
		out = append(out, e[:4]...)
		if tag := le.Uint16(e); tag == aclUser || tag == aclGroup {
			out = append(out, e[4:8]...)
		}
	}
	return out, nil
}

func pad4(n int) int { return (n + 3) &^ 3 }

// xattrSize is what xs take, with the null word that ends the entries.
func xattrSize(xs []xattr) int {
	n := 4
	for _, x := range xs {
		n += 16 + pad4(len(x.name)) + pad4(len(x.value))
	}
	return n
}

// hash is what the kernel names the attribute by when it shares blocks.
func (x xattr) hash() uint32 {
	var h uint32
	for _, c := range []byte(x.name) {
		h = h<<5 ^ h>>27 ^ uint32(c)
	}
	v := append(slices.Clone(x.value), 0, 0, 0)
	for v = v[:pad4(len(x.value))]; len(v) > 0; v = v[4:] {
		h = h<<16 ^ h>>16 ^ le.Uint32(v)
	}
	return h
}

// putXattrs writes entries from the front of p and values from its end.
// Offsets count from base bytes before p.
func putXattrs(p []byte, base int, xs []xattr) {
	at, end := 0, len(p)
	for _, x := range xs {
		e := p[at:]
		e[0], e[1] = byte(len(x.name)), x.index
		if len(x.value) > 0 {
			end -= pad4(len(x.value))
			copy(p[end:], x.value)
			le.PutUint16(e[2:], uint16(base+end))
		}
		le.PutUint32(e[8:], uint32(len(x.value)))
		le.PutUint32(e[12:], x.hash())
		copy(e[16:], x.name)
		at += 16 + pad4(len(x.name))
	}
}

// xattrBlock makes the block number b that holds xs.
func xattrBlock(seed uint32, b int64, xs []xattr) []byte {
	p := make([]byte, BlockSize)
	le.PutUint32(p, xattrMagic)
	le.PutUint32(p[4:], 1) // users
	le.PutUint32(p[8:], 1) // blocks
	var h uint32
	for _, x := range xs {
		h = h<<16 ^ h>>16 ^ x.hash()
	}
	le.PutUint32(p[12:], h)
	putXattrs(p[xattrHeader:], xattrHeader, xs)
	le.PutUint32(p[16:], crc(seed, le64(uint64(b)), p))
	return p
}
