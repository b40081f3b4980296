package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/agentiso/agentiso/internal/fault"
	"github.com/agentiso/agentiso/internal/image/ext4"
)

var (
	// errArchive marks what is wrong with the stream itself.
	errArchive  = errors.New("the archive is not usable")
	errEmpty    = errors.New("it is empty")
	errTooLarge = errors.New("the unpacked image is larger than allowed")
)

// refused are the errors of a tree that cannot be built: the image's fault.
var refused = []error{
	errArchive, ext4.ErrEscape, ext4.ErrName, ext4.ErrNotDir, ext4.ErrIsRoot, ext4.ErrLoop,
	ext4.ErrNotFound, ext4.ErrLinkDir, ext4.ErrAttribute, io.ErrUnexpectedEOF,
}

// explain turns what went wrong while making what into a fault, as far as its
// cause is one that the user can do something about.
func (s *Store) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err
	}
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w", what, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fault.New(fault.NoSpace, "%s: no space left in %s: %w", what, s.o.Dir, err).
			WithNext("Free some space there, or remove images with `agentiso image rm`.")
	case errors.Is(err, ext4.ErrTooMany), errors.Is(err, ext4.ErrTooLarge), errors.Is(err, errTooLarge):
		return fault.New(fault.Limit, "%s: %w (limits: %d GiB, %d files)", what, err, s.o.MaxBytes>>30, s.o.MaxFiles).
			WithNext("Use a smaller image.")
	}
	for _, e := range refused {
		if errors.Is(err, e) {
			return fault.New(fault.Invalid, "%s: %w", what, err).
				WithNext("Check that it is a complete tar archive of a root file system, plain or compressed with gzip, xz, zstd or bzip2.")
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}
