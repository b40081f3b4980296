package files

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxMoveEntries bounds a move from one file system to another.
const maxMoveEntries = 1_000_000

// tempName is a name beside p for what becomes p by a rename.
func tempName(p string) string {
	return path.Join(path.Dir(p), ".agentiso-"+rand.Text()[:12])
}

// moveAcross moves src to dst on another file system: a copy under a temporary
// name, a rename, and only then the removal of src. After an error before the
// rename nothing has changed. Hard links become files of their own.
func moveAcross(ctx context.Context, src, dst string) (err error) {
	temp := tempName(dst)
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(temp))
		}
	}()
	left := maxMoveEntries
	if err := copyTree(ctx, src, temp, &left); err != nil {
		return err
	}
	if err := os.Rename(temp, dst); err != nil {
		return err
	}
	if err := os.RemoveAll(src); err != nil {
		return fmt.Errorf("'%s' was copied to '%s' but not removed: %w", src, dst, err)
	}
	return nil
}

func copyTree(ctx context.Context, src, dst string, left *int) error {
	if *left--; *left < 0 {
		return tooMany(maxMoveEntries)
	}
	fi, err := os.Lstat(src)
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("copy %s: no file status", src)
	}
	switch {
	case fi.IsDir():
		if err := os.Mkdir(dst, 0o700); err != nil {
			return err
		}
		names, err := readNames(src, math.MaxInt32)
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := copyTree(ctx, filepath.Join(src, name), filepath.Join(dst, name), left); err != nil {
				return err
			}
		}
	case fi.Mode().IsRegular():
		if err := copyFile(ctx, src, dst); err != nil {
			return err
		}
	case fi.Mode()&fs.ModeSymlink != 0:
		text, err := os.Readlink(src)
		if err != nil {
			return err
		}
		if err := os.Symlink(text, dst); err != nil {
			return err
		}
		return copyOwner(dst, st)
	default:
		if err := unix.Mknod(dst, st.Mode, int(st.Rdev)); err != nil {
			return pathError("mknod", dst, err)
		}
	}
	if err := copyOwner(dst, st); err != nil {
		return err
	}
	// Owner before mode: a change of owner clears the set-user-id bit.
	if err := os.Chmod(dst, fi.Mode()); err != nil {
		return err
	}
	return os.Chtimes(dst, fi.ModTime(), fi.ModTime())
}

// copyOwner is for root: a user's copy belongs to the user.
func copyOwner(dst string, st *syscall.Stat_t) error {
	if err := os.Lchown(dst, int(st.Uid), int(st.Gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}

func copyFile(ctx context.Context, src, dst string) (err error) {
	in, err := os.OpenFile(src, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := appendFile(ctx, out, in); err != nil {
		return err
	}
	return copyAttrs(attrsOf(out), attrsAt(src))
}

// appendFile copies what is left of in to out inside the kernel, in pieces, so
// that a caller who has gone is noticed.
func appendFile(ctx context.Context, out, in *os.File) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(out, in, 16<<20)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
	}
}

// copyAttrs copies the user's own attributes as far as the file system has
// them.
func copyAttrs(dst, src attrs) error {
	n, err := src.list(nil)
	if err != nil || n == 0 {
		return ignoreUnsupported(err)
	}
	list := make([]byte, maxAttrList)
	if n, err = src.list(list); err != nil {
		return ignoreUnsupported(err)
	}
	value := make([]byte, maxAttrValue)
	for k := range strings.SplitSeq(string(list[:n]), "\x00") {
		if !strings.HasPrefix(k, "user.") {
			continue
		}
		n, err := src.get(k, value)
		if err != nil {
			continue
		}
		if err := ignoreUnsupported(dst.set(k, value[:n])); err != nil {
			return fmt.Errorf("copy attribute %s: %w", k, err)
		}
	}
	return nil
}
