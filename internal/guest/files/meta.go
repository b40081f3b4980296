package files

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Metadata of a file lives in extended attributes below this prefix, which
// callers do not see. With it a key fills the 255 bytes of an attribute's name.
const (
	metaPrefix  = "user.e2b."
	metaHeader  = "X-Metadata-"
	maxMetaKey  = 255 - len(metaPrefix)
	maxMetaSize = 4096 // of all keys and values of one upload
)

// Bounds of what is read back: anything may have written the attributes.
const (
	maxAttrList  = 64 << 10 // XATTR_LIST_MAX
	maxAttrValue = 64 << 10 // XATTR_SIZE_MAX
	maxMetaRead  = 64 << 10 // all values of one file
)

// metadataOf reads the X-Metadata-KEY headers of an upload. Keys are lower
// case, because headers have none; of a repeated header the first counts. The
// result is nil when there is none.
func metadataOf(h http.Header) (map[string]string, error) {
	var meta map[string]string
	size := 0
	for name, values := range h {
		if len(name) <= len(metaHeader) || !strings.EqualFold(name[:len(metaHeader)], metaHeader) || len(values) == 0 {
			continue
		}
		key, value := strings.ToLower(name[len(metaHeader):]), values[0]
		if len(key) > maxMetaKey {
			return nil, invalidf("metadata key %.32s… is longer than %d bytes", key, maxMetaKey)
		}
		if !printable(key) || !printable(value) {
			return nil, invalidf("metadata %q is not printable ASCII", key)
		}
		if size += len(key) + len(value); size > maxMetaSize {
			return nil, invalidf("metadata is larger than %d bytes", maxMetaSize)
		}
		if meta == nil {
			meta = map[string]string{}
		}
		meta[key] = value
	}
	return meta, nil
}

func printable(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// attrs are the calls for one file, by path or by descriptor.
type attrs struct {
	list   func([]byte) (int, error)
	get    func(string, []byte) (int, error)
	set    func(string, []byte) error
	remove func(string) error
}

func attrsOf(f *os.File) attrs {
	fd := int(f.Fd())
	return attrs{
		list:   func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		get:    func(k string, b []byte) (int, error) { return unix.Fgetxattr(fd, k, b) },
		set:    func(k string, b []byte) error { return unix.Fsetxattr(fd, k, b, 0) },
		remove: func(k string) error { return unix.Fremovexattr(fd, k) },
	}
}

func attrsAt(path string) attrs {
	return attrs{
		list: func(b []byte) (int, error) { return unix.Listxattr(path, b) },
		get:  func(k string, b []byte) (int, error) { return unix.Getxattr(path, k, b) },
	}
}

// keys are the names of the metadata attributes, with the prefix. A file system
// without attributes has none.
func (a attrs) keys() ([]string, error) {
	// Most files have no attribute at all: ask for the size first.
	n, err := a.list(nil)
	if err != nil || n == 0 {
		return nil, ignoreUnsupported(err)
	}
	b := make([]byte, min(2*n+256, maxAttrList))
	if n, err = a.list(b); err != nil {
		return nil, ignoreUnsupported(err)
	}
	var keys []string
	for k := range strings.SplitSeq(string(b[:n]), "\x00") {
		if len(k) > len(metaPrefix) && strings.HasPrefix(k, metaPrefix) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys, nil
}

// read returns the metadata, nil when there is none. What cannot be read is
// left out: a file's entry is worth more than one of its attributes.
func (a attrs) read() map[string]string {
	keys, err := a.keys()
	if err != nil || len(keys) == 0 {
		return nil
	}
	meta := map[string]string{}
	size := 0
	b := make([]byte, 1024)
	for _, k := range keys {
		n, err := a.get(k, b)
		if errors.Is(err, unix.ERANGE) {
			b = make([]byte, maxAttrValue)
			n, err = a.get(k, b)
		}
		if err != nil {
			continue
		}
		if size += len(k) + n; size > maxMetaRead {
			break
		}
		meta[valid(k[len(metaPrefix):])] = valid(string(b[:n]))
	}
	return meta
}

// replace makes meta the file's whole metadata.
func (a attrs) replace(meta map[string]string) error {
	old, err := a.keys()
	if err != nil {
		return fmt.Errorf("list metadata: %w", err)
	}
	for _, k := range old {
		if _, keep := meta[k[len(metaPrefix):]]; keep {
			continue
		}
		if err := a.remove(k); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("remove metadata: %w", err)
		}
	}
	for k, v := range meta {
		err := a.set(metaPrefix+k, []byte(v))
		switch {
		case errors.Is(err, unix.EOPNOTSUPP):
			return invalidf("metadata cannot be kept: the file system has no extended attributes")
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.E2BIG), errors.Is(err, unix.ERANGE):
			// ext4 keeps all attributes of a file in one block.
			return invalidf("metadata does not fit into the file's extended attributes")
		case err != nil:
			return fmt.Errorf("set metadata: %w", err)
		}
	}
	return nil
}

func ignoreUnsupported(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return nil
	}
	return err
}
