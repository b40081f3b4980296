package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/agentiso/agentiso/client"
	"github.com/agentiso/agentiso/internal/fault"
)

func (a *app) newImage() *cobra.Command {
	return group("image", "Manage the disks that workspaces stand on",
		a.newImageBuild(), a.newImagePull(), a.newImageImport(), a.newImageLs(), a.newImageInfo(), a.newImageRm())
}

var recipes = []string{
	"minimal\tbusybox; seconds", "dev\tbash, git, curl, python3; minutes", "dev-full\tdev with node, npm and build tools",
}

func (a *app) newImageBuild() *cobra.Command {
	var o client.BuildImageOptions
	cmd := &cobra.Command{
		Use: "build [flags] RECIPE", Short: "Build one of the built-in images",
		Long: `Build makes an image from the distribution's packages:

  minimal    busybox; done in seconds
  dev        bash, git, curl, ca-certificates, python3, and a user called user
  dev-full   dev with node, npm and build tools

An image that is there is not built again without --force.`,
		Example: "  agentiso image build dev",
		Args:    nargs(1, 1, "one recipe"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			o.Recipe = args[0]
			p := a.progress("building " + o.Recipe)
			i, err := c.BuildImage(ctx, o, p.report)
			p.stop()
			return a.madeImage(i, err)
		}),
		ValidArgsFunction: cobra.FixedCompletions(recipes, cobra.ShellCompDirectiveNoFileComp),
	}
	cmd.Flags().StringVar(&o.Name, "name", "", "`name` of the image (default: the recipe's)")
	cmd.Flags().BoolVar(&o.Force, "force", false, "build even when it is there")
	return cmd
}

// madeImage prints an image that has just been made.
func (a *app) madeImage(i *client.Image, err error) error {
	if err != nil {
		return err
	}
	return a.done(imageName(i), i)
}

func imageName(i *client.Image) string {
	if len(i.Names) > 0 {
		return i.Names[0]
	}
	return i.Digest
}

func (a *app) newImagePull() *cobra.Command {
	var o client.PullImageOptions
	cmd := &cobra.Command{
		Use: "pull [flags] REFERENCE", Short: "Fetch an OCI image from a registry",
		Long: `Pull fetches an OCI (Docker) image and makes a disk of it; its user, environment,
directory and command are kept. Credentials are taken from this user's Docker
configuration (~/.docker/config.json with its credential helpers).`,
		Example: `  agentiso image pull registry.example/team/tools:v2
  agentiso image pull --name tools localhost:5000/tools`,
		Args: nargs(1, 1, "one reference"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			o.Reference = args[0]
			var err error
			if o.Auth, err = registryAuth(ctx, o.Reference); err != nil {
				return err
			}
			p := a.progress("pulling " + o.Reference)
			i, err := c.PullImage(ctx, o, p.report)
			p.stop()
			return a.madeImage(i, err)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().StringVar(&o.Name, "name", "", "`name` of the image (default: the reference's repository and tag)")
	cmd.Flags().BoolVar(&o.Insecure, "insecure", false, "use plain HTTP (registries on this host need no asking)")
	return cmd
}

func (a *app) newImageImport() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "import [flags] FILE|DIRECTORY|-", Short: "Make an image of a root file system",
		Long: `Import makes an image of a tar archive (plain, or compressed with gzip, xz or
zstd), of a directory with its numeric owners, or of a tar stream on standard
input. The name is made of the file's when none is given.`,
		Example: `  agentiso image import rootfs.tar.gz
  agentiso image import --name mine ./rootfs
  docker export box | agentiso image import --name box -`,
		Args: nargs(1, 1, "one file or directory"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			if name == "" {
				if name = importName(args[0]); name == "" {
					return fault.New(fault.Invalid, "no name for the image can be made of %q", args[0]).WithNext("Give one with --name.")
				}
			}
			p := a.progress("importing " + name)
			i, err := a.importImage(ctx, c, name, args[0], p)
			p.stop()
			return a.madeImage(i, err)
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "`name` of the image")
	return cmd
}

var (
	archiveSuffix = regexp.MustCompile(`(?i)(\.tar(\.(gz|xz|zst|bz2))?|\.t(gz|xz|zst))$`)
	notInName     = regexp.MustCompile(`[^a-z0-9._-]+`)
)

// importName makes an image's name of a file's; "" when nothing is left.
func importName(path string) string {
	if path == "-" {
		return ""
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return ""
	}
	base := archiveSuffix.ReplaceAllString(filepath.Base(abs), "")
	return strings.Trim(notInName.ReplaceAllString(strings.ToLower(base), "-"), "-._")
}

func (a *app) importImage(ctx context.Context, c *client.Client, name, source string, p *progress) (*client.Image, error) {
	if source == "-" {
		return c.ImportImage(ctx, name, &counted{r: a.stdin, p: p})
	}
	st, err := os.Stat(source)
	if err != nil {
		return nil, unreadable(err)
	}
	if !st.IsDir() {
		f, err := os.Open(source)
		if err != nil {
			return nil, unreadable(err)
		}
		defer f.Close()
		return c.ImportImage(ctx, name, &sized{r: f, p: p, total: st.Size()})
	}
	pr, pw := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		_, err := client.PackDirectory(pw, source, p.bytes)
		_ = pw.CloseWithError(err)
		packed <- err
	}()
	i, err := c.ImportImage(ctx, name, pr)
	_ = pr.CloseWithError(io.ErrClosedPipe)
	if perr := <-packed; perr != nil && !errors.Is(perr, io.ErrClosedPipe) {
		return nil, perr
	}
	return i, err
}

func unreadable(err error) error {
	k := fault.Missing
	if errors.Is(err, fs.ErrNotExist) {
		k = fault.NotFound
	}
	return fault.New(k, "%w", err).WithNext("Check the path.")
}

// sized shows how much of a file has passed; at its end the daemon is still
// making the disk.
type sized struct {
	r           io.Reader
	p           *progress
	done, total int64
}

func (s *sized) Read(b []byte) (int, error) {
	n, err := s.r.Read(b)
	s.done += int64(n)
	if err != nil {
		s.p.report(client.Progress{Stage: "writing the disk"})
	} else {
		s.p.bytes(s.done, s.total)
	}
	return n, err
}

func (a *app) newImageLs() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List images",
		Example: "  agentiso image ls",
		Args:    nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			all, err := c.Images(ctx)
			if err != nil {
				return err
			}
			t := newTable(a.stdout, "NAME", "DIGEST", "DISK", "USED", "SOURCE", "CREATED")
			for _, i := range all {
				switch {
				case a.json:
					if err := a.emit(i); err != nil {
						return err
					}
				case quiet:
					fmt.Fprintln(a.stdout, i.Digest)
				default:
					t.row(strings.Join(i.Names, ", "), shortDigest(i.Digest), formatBytes(i.SizeBytes), formatBytes(i.UsedBytes), i.Source, formatAge(i.CreatedAt))
				}
			}
			if a.json || quiet {
				return nil
			}
			return t.flush()
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print digests only")
	return cmd
}

// shortDigest is long enough to be told apart and to be typed.
func shortDigest(d string) string {
	const digits = 12
	algorithm, sum, ok := strings.Cut(d, ":")
	if !ok || len(sum) <= digits {
		return d
	}
	return algorithm + ":" + sum[:digits]
}

func (a *app) newImageInfo() *cobra.Command {
	return &cobra.Command{
		Use: "info IMAGE...", Short: "Show an image",
		Example: "  agentiso image info dev",
		Args:    nargs(1, -1, "images"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(args, func(ref string) error {
				i, err := c.Image(ctx, ref)
				if err != nil {
					return err
				}
				if a.json {
					return a.emit(i)
				}
				env := make([]string, 0, len(i.Env))
				for _, k := range slices.Sorted(maps.Keys(i.Env)) {
					env = append(env, k+"="+i.Env[k])
				}
				return describe(a.stdout,
					field{"names", strings.Join(i.Names, ", ")}, field{"digest", i.Digest}, field{"source", i.Source},
					field{"created", formatAge(i.CreatedAt)}, field{"disk", formatBytes(i.SizeBytes)}, field{"used", formatBytes(i.UsedBytes)},
					field{"user", i.User}, field{"workdir", i.Workdir}, field{"env", strings.Join(env, "\n")},
					field{"entrypoint", strings.Join(i.Entrypoint, " ")}, field{"cmd", strings.Join(i.Cmd, " ")},
					field{"used by", strings.Join(i.UsedBy, ", ")},
				)
			})
		}),
		ValidArgsFunction: a.completeImages,
	}
}

func (a *app) newImageRm() *cobra.Command {
	return &cobra.Command{
		Use: "rm IMAGE...", Aliases: []string{"remove"}, Short: "Remove images",
		Long:    "Rm removes a name, and the disk when no other name and no workspace needs it.",
		Example: "  agentiso image rm tools",
		Args:    nargs(1, -1, "images"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(args, func(ref string) error {
				digest, removed, err := c.RemoveImage(ctx, ref)
				if err != nil {
					return err
				}
				return a.done(ref, struct {
					Digest      string `json:"digest"`
					DiskRemoved bool   `json:"disk_removed"`
				}{digest, removed})
			})
		}),
		ValidArgsFunction: a.completeImages,
	}
}

func (a *app) newKernel() *cobra.Command {
	return group("kernel", "Manage the kernels that machines boot", a.newKernelFetch(), a.newKernelBuild(), a.newKernelLs())
}

func (a *app) newKernelFetch() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "fetch", Short: "Download the distribution's cloud kernel",
		Long:    "Fetch downloads and unpacks (but does not install) the distribution's kernel for virtual machines.",
		Example: "  agentiso kernel fetch",
		Args:    nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			p := a.progress("fetching the kernel")
			k, err := c.FetchKernel(ctx, force, p.report)
			p.stop()
			if err != nil {
				return err
			}
			return a.done(k.Name, k)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().BoolVar(&force, "force", false, "download even when it is there")
	return cmd
}

func (a *app) newKernelBuild() *cobra.Command {
	var jobs int
	var force bool
	cmd := &cobra.Command{
		Use: "build", Short: "Build the lean kernel and make it the default",
		Long: `Build compiles a kernel that has what a micro-VM needs and nothing else, from the
distribution's source: about nine minutes on two cores. Machines then boot about
three times faster than with the distribution's.`,
		Example: "  agentiso kernel build --jobs 8",
		Args:    nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			p := a.progress("building the kernel")
			k, err := c.BuildKernel(ctx, jobs, force, p.report)
			p.stop()
			if err != nil {
				return err
			}
			return a.done(k.Name, k)
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	cmd.Flags().IntVarP(&jobs, "jobs", "j", 0, "parallel compilations (default: the number of cores)")
	cmd.Flags().BoolVar(&force, "force", false, "build even when it is there")
	return cmd
}

func (a *app) newKernelLs() *cobra.Command {
	return &cobra.Command{
		Use: "ls", Aliases: []string{"list"}, Short: "List kernels",
		Example: "  agentiso kernel ls",
		Args:    nargs(0, 0, "no arguments"),
		RunE: a.withDaemon(func(ctx context.Context, c *client.Client, _ []string) error {
			all, err := c.Kernels(ctx)
			if err != nil {
				return err
			}
			t := newTable(a.stdout, "NAME", "RELEASE", "DEFAULT", "SIZE", "SOURCE", "CREATED")
			for _, k := range all {
				if a.json {
					if err := a.emit(k); err != nil {
						return err
					}
					continue
				}
				def := ""
				if k.Default {
					def = "yes"
				}
				t.row(k.Name, k.Release, def, formatBytes(k.SizeBytes), k.Source, formatAge(k.CreatedAt))
			}
			if a.json {
				return nil
			}
			return t.flush()
		}),
		ValidArgsFunction: cobra.NoFileCompletions,
	}
}
