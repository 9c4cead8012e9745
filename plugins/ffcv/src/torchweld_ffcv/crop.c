/* Decode a part of a JPEG instead of all of it: the rows below are never decoded, those above only
 * as far as the format asks for, and left and right of the part colours are not converted.
 *
 * Compiled on the machine where it is used, against the libjpeg-turbo that is there for ffcv.
 */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>

#include <jpeglib.h>

struct failure {
    struct jpeg_error_mgr base;
    jmp_buf back;
};

/* The library's own functions would end the process, or print. */
static void fail(j_common_ptr info) { longjmp(((struct failure *)info->err)->back, 1); }

static void count_warning(j_common_ptr info, int level) {
    if (level < 0) info->err->num_warnings++;
}

/* Chroma of the pixels next door takes part in a pixel: with this much around it, the part is the
 * same as in the whole image, bit for bit. */
static const uint32_t MARGIN = 16;

/* Write rows [top, bottom) and columns [left, right) of an image of height x width pixels to their
 * places in `pixels`, 3 bytes a pixel; what is around them there may be written, too. Returns 0, or
 * -1 where the file is damaged or not of that size.
 */
int decode_part(const uint8_t *source, uint64_t size, uint32_t height, uint32_t width,
                uint8_t *pixels, uint32_t top, uint32_t bottom, uint32_t left, uint32_t right) {
    struct jpeg_decompress_struct info;
    struct failure failure;
    info.err = jpeg_std_error(&failure.base);
    failure.base.error_exit = fail;
    failure.base.emit_message = count_warning;
    if (setjmp(failure.back)) {
        jpeg_destroy_decompress(&info);
        return -1;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, source, size);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    info.dct_method = JDCT_FASTEST; /* as ffcv has it */
    jpeg_start_decompress(&info);
    if (info.output_height != height || info.output_width != width || info.output_components != 3)
        fail((j_common_ptr)&info);

    JDIMENSION first = left > MARGIN ? left - MARGIN : 0;
    JDIMENSION columns = (right + MARGIN < width ? right + MARGIN : width) - first;
    if (columns < width) jpeg_crop_scanline(&info, &first, &columns);
    JDIMENSION begin = top > MARGIN ? top - MARGIN : 0;
    if (begin > 0) jpeg_skip_scanlines(&info, begin);
    JDIMENSION end = bottom + MARGIN < height ? bottom + MARGIN : height;
    while (info.output_scanline < end) {
        uint64_t place = (uint64_t)info.output_scanline * width + first;
        JSAMPROW row = pixels + 3 * place;
        jpeg_read_scanlines(&info, &row, 1);
    }
    int warnings = failure.base.num_warnings > 0;
    jpeg_destroy_decompress(&info); /* also where rows are left: no need to finish */
    return warnings ? -1 : 0;
}
