package client

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

var errNoSpace = syscall.ENOSPC

// packer writes local files as a tar stream.
type packer struct {
	result   *Copied
	progress func(done, total int64)
	total    int64

	tw    *tar.Writer
	buf   [copyBlock]byte
	links map[inode]string // names of files with several links
}

type inode struct{ dev, ino uint64 }

// PackDirectory writes the directory dir as a tar stream to w, names relative
// to it, "./" first, with numeric owners: what [Client.ImportImage] takes.
func PackDirectory(w io.Writer, dir string, progress func(done, total int64)) (Copied, error) {
	var r Copied
	p := &packer{result: &r, progress: progress}
	if progress != nil {
		p.total = sizeOf(dir)
	}
	p.tw = tar.NewWriter(w)
	p.links = map[inode]string{}
	if err := p.walk(dir, "", false); err != nil {
		return r, localError(err)
	}
	return r, p.tw.Close()
}

// pack writes local, a file or a directory, under name; "" makes a directory's
// entries relative to it. Owners become root, which the agent takes for the
// user that unpacks when that is another.
func (p *packer) pack(w io.Writer, local, name string) error {
	p.tw = tar.NewWriter(w)
	p.links = map[inode]string{}
	if err := p.walk(local, name, true); err != nil {
		return err
	}
	return p.tw.Close()
}

// walk packs local and what is below it. Directories come before what is in
// them.
func (p *packer) walk(local, name string, rootOwned bool) error {
	// The file given is followed if it is a link; those below are not.
	top, err := filepath.EvalSymlinks(local)
	if err != nil {
		return err
	}
	return filepath.WalkDir(top, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(top, file)
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) && file != top {
			return nil // it went while we walked
		}
		if err != nil {
			return err
		}
		return p.entry(file, filepath.ToSlash(filepath.Join(name, rel)), fi, rootOwned)
	})
}

func (p *packer) entry(file, name string, fi fs.FileInfo, rootOwned bool) error {
	target := ""
	switch {
	case fi.Mode().IsRegular(), fi.IsDir():
	case fi.Mode()&fs.ModeSymlink != 0:
		var err error
		if target, err = os.Readlink(file); err != nil {
			return err
		}
	default:
		p.result.skip(file)
		return nil
	}
	h, err := tar.FileInfoHeader(fi, target)
	if err != nil {
		return err
	}
	h.ModTime = fi.ModTime().Truncate(time.Second) // archive/tar would round it, into the future
	h.Name = name
	if fi.IsDir() {
		h.Name = strings.TrimSuffix(name, "/") + "/"
	}
	// Names of this host's accounts mean nothing in the guest.
	h.Uname, h.Gname = "", ""
	if rootOwned {
		h.Uid, h.Gid = 0, 0
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && fi.Mode().IsRegular() && st.Nlink > 1 {
		key := inode{st.Dev, st.Ino}
		if first, ok := p.links[key]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			p.links[key] = h.Name
		}
	}
	if !regular(h) {
		p.result.Files++
		return p.tw.WriteHeader(h)
	}
	return p.contents(file, h)
}

func (p *packer) contents(file string, h *tar.Header) error {
	// A file that became a FIFO since must not be waited for.
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := p.tw.WriteHeader(h); err != nil {
		return err
	}
	src := &tally{r: io.LimitReader(f, h.Size), result: p.result, total: p.total, progress: p.progress}
	n, err := io.CopyBuffer(onlyWriter{p.tw}, src, p.buf[:])
	if err != nil {
		return err
	}
	if n < h.Size {
		return fmt.Errorf("%s shrank from %d to %d bytes while it was read", file, h.Size, n)
	}
	p.result.Files++
	return nil
}

// onlyWriter hides ReadFrom, which would not use our buffer.
type onlyWriter struct{ io.Writer }

// sizeOf sums up contents, for progress: what cannot be read counts nothing.
func sizeOf(local string) int64 {
	top, err := filepath.EvalSymlinks(local)
	if err != nil {
		return 0
	}
	var sum int64
	_ = filepath.WalkDir(top, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if fi, err := d.Info(); err == nil {
				sum += fi.Size()
			}
		}
		return nil
	})
	return sum
}
